"""The files of a run, each as the one class that writes and reads it. Needs no torch."""
