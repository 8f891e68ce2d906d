"""Training, validation and prediction for any timm model; nothing here sees `glattn.layers`."""
