# shellcheck shell=bash
# What the four container scripts share: build_image <target> [options], run_image <target> [options] -- <command>.
# CONTAINER_ENGINE names another engine with docker's command line (podman).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
engine=${CONTAINER_ENGINE:-docker}
script=$(basename "$0")

refuse() {
  printf '%s: %s\n' "$script" "$1" >&2
  exit 2
}

need_engine() {
  command -v "$engine" >/dev/null ||
    refuse "'$engine' was not found: install it, or name another engine in CONTAINER_ENGINE."
}

# The image's user is the one who builds it, so that results on the host have the right owner; never root.
build_image() {
  local target=$1 user group
  shift
  need_engine
  user=$(id -u) group=$(id -g)
  if ((user == 0)); then user=1000 group=1000; fi
  exec "$engine" build --file "$root/setup/docker/Dockerfile" --target "$target" --tag "purejax_bilevel:$target" \
    --build-arg "USER_ID=$user" --build-arg "GROUP_ID=$group" "$@" "$root"
}

# The key reaches the container through the environment of this process: no command line shows it, no layer holds it.
read_wandb_key() {
  if [[ -z "${WANDB_API_KEY-}" && -r "$root/setup/wandb_key" ]]; then
    WANDB_API_KEY=$(tr -d '[:space:]' <"$root/setup/wandb_key")
  fi
  if [[ -n "${WANDB_API_KEY-}" ]]; then export WANDB_API_KEY; fi
}

run_image() {
  local target=$1 options=() cache=${XDG_CACHE_HOME:-$HOME/.cache}/purejax_bilevel/container
  shift
  while [[ "$1" != -- ]]; do
    options+=("$1")
    shift
  done
  shift
  need_engine
  mkdir -p "$root/runs" "$cache"
  if (($(id -u) == 0)); then
    chown 1000:1000 "$root/runs" "$cache" # the image's user: root on the host is not root in the container
  else
    options+=(--user "$(id -u):$(id -g)")
  fi
  if [[ -t 0 && -t 1 ]]; then options+=(--interactive --tty); fi
  read_wandb_key
  exec "$engine" run --rm --init "${options[@]}" \
    --volume "$root/runs:/app/runs" --volume "$cache:/cache" \
    --env WANDB_API_KEY --env WANDB_MODE --env WANDB_PROJECT --env WANDB_ENTITY --env WANDB_BASE_URL --env XLA_FLAGS \
    "purejax_bilevel:$target" "$@"
}
