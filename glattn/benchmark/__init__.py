"""Speed, memory and cost of models side by side on the machine at hand."""
