"""Gates on whole layers, learned in fine-tuning. This folder imports the flow and the stages below it."""
