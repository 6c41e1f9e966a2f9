"""Generated images and other results: files of them, and parts from which an interrupted command goes on."""
