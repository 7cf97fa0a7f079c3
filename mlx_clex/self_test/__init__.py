"""Check this device against stored answers and float64, for `doctor --self-test`."""
