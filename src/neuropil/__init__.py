"""See, shrink, grow, build, train and measure neural networks one neuron at a time."""

__version__ = "0.1.0"
