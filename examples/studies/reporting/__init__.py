"""Result files, tables and figures of the studies."""
