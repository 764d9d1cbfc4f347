"""Claims, data from the Hub and result files, which all reproductions of papers share."""
