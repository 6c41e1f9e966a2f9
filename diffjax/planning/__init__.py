"""What can be said about speed and memory from the compiled program."""
