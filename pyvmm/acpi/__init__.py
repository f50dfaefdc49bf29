"""ACPI tables and the AML in them."""
