"""Operators and the native extension behind them."""
