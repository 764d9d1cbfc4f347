"""What the verbs share: options, inputs, output, plots."""
