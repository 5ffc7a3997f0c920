"""Measurements against other libraries; run each as `python -m benchmarks.NAME`."""
