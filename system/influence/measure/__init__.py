"""How one run is made and scored: ledger, proxy, gradients."""
