"""From a layout to a mesh of ranks, and to a model that is spread over it."""
