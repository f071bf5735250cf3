"""The operators registered with torch, one module per family; they call C++ or Triton."""
