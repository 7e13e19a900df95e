"""From formulas to a plan: ledgers of layouts, their price, the search, goodput, the report. No torch."""
