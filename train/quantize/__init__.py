"""Quantizes trained weights: computes row scales and GPTQ's Hessians, and rounds weights to nearest or by GPTQ."""
