"""The trusted server: connections, fair turns, limits, rules, metrics. It never needs torch."""
