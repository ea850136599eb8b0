"""How much data, bias, energy and certainty."""
