"""The demonstration: a training job that is dumped, killed, restored, and ends as if nothing had happened."""
