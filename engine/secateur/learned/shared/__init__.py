"""What the systems that learn share: the trainer and the regularisers of gates."""
