"""Where headscale meets other tools: trainers, trackers, indexes. Import what you need from its own module."""
