"""The tests of livemove: unit, contract, sim and integration."""
