"""Surgery: carry out a plan, verify the result and save it. It uses planning and the stages below it."""
