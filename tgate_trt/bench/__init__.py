"""Measurements that are recorded and never asserted: what ``tgate-bench`` can measure, as records, tables and figures.

`suite` gives a record for each of its commands; `report` shows records as tables, and `plot` as figures.
"""
