"""Network links of a given rate between processes of one machine."""
