"""Devices for containers by the Container Device Interface: specifications read, ours written, names resolved."""
