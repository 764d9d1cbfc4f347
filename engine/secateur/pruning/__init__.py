"""Surgery: the plan carried out, verified and saved. It uses planning and the stages below it."""
