"""The data of one step: records, tables, states, and the plan that a backend carries out. Decides nothing."""
