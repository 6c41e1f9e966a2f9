"""Generation by sample number, samples files, and resumable writing in parts."""
