"""How the model is cut over devices, as numbers and names: cuts, stages, slices, degrees, checks of a YAML's layout."""
