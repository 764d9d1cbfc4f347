"""What measurements share: the commit that is measured, results as JSON, timing in turns, packages of weights."""
