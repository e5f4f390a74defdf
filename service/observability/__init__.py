"""The record of each request, and what is made of it: metrics, log lines, traces, headers."""
