"""The record of each request, and the metrics, log lines, traces and headers made from it."""
