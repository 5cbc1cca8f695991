"""Quantizes trained weights to codes: row scales, rounding to nearest or by GPTQ, and the Hessians that GPTQ needs."""
