"""What an exchange is compared with: alone, pooled, averaged weights."""
