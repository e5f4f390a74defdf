"""Data sets: reading, checking, fetching and loading labelled images."""
