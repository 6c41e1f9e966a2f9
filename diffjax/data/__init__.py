"""Image sources and the input pipeline; numpy only, no device is touched."""
