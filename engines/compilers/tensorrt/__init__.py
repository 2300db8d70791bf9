"""TensorRT and TensorRT-RTX through torch-tensorrt."""
