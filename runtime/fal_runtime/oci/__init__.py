"""Isolated containers: runc or crun under conmon. `fal_runtime.oci.driver.OciDriver` is the way in."""
