"""A virtual machine monitor on KVM whose only device model is a vhost-user frontend."""
