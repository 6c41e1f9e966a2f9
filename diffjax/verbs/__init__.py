"""What a user can ask for: one file per verb, named after it."""
