"""The quantized network: quantizers, layers, bit-widths, supernet and cost."""
