"""Gates on whole layers, learned in fine-tuning. They use the flow and the stages below it."""
