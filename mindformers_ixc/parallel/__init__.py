"""How the model is cut over devices, and what proves it without any: cuts, stages, device-free compilation."""
