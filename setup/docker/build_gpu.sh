#!/usr/bin/env bash
# Build the image purejax_bilevel:gpu. Further arguments go to the engine, for example --build-arg EXTRAS=brax.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
build_image gpu "$@"
