"""The parts of a training run, each built by its `build_*` function from its own section of the configuration."""
