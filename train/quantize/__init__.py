"""From trained weights to codes: row scales, rounding with error feedback, and the Hessians it needs."""
