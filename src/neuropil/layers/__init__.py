"""Other kinds of neuron."""
