#!/usr/bin/env bash
# Runs a real OpenTelemetry Collector and a real Jaeger on loopback, without
# Docker. `local.sh help` says how.

set -euo pipefail

usage() {
  cat <<'EOF'
usage: local.sh COMMAND

  up       build the Collector and Jaeger if need be, start both, wait until
           they are ready, and print the addresses
  down     stop both
  status   say what is running and where; exit 0 if both are up, 3 if not
  env      print the addresses as NAME=VALUE lines:
             export $(collector-config/local.sh env)
  build    only build
  help     this text

The first build needs Go 1.25 or newer and the network, and takes some minutes.
Later runs need neither: a program is built again only when its sources in
collector-config/collector or collector-config/jaeger change.

Environment (default):
  CONNTRACK_OTLP_GRPC_PORT     Collector, OTLP over gRPC            (4317)
  CONNTRACK_OTLP_HTTP_PORT     Collector, OTLP over HTTP            (4318)
  CONNTRACK_PROM_PORT          Collector, /metrics for Prometheus   (8889)
  CONNTRACK_HEALTH_PORT        Collector, health check              (13133)
  CONNTRACK_JAEGER_OTLP_PORT   Jaeger, OTLP over gRPC               (14317)
  CONNTRACK_JAEGER_QUERY_PORT  Jaeger, query API                    (16686)
  CONNTRACK_TOOLS_DIR          built programs     (<repo>/target/collector)
  CONNTRACK_RUN_DIR            pid files and logs (<tools dir>/run)
  CONNTRACK_WAIT_SECONDS       how long `up` waits for each program  (60)

To run a second pair next to the first, give it other ports and another
CONNTRACK_RUN_DIR.
EOF
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tools=${CONNTRACK_TOOLS_DIR:-$(dirname "$here")/target/collector}
run=${CONNTRACK_RUN_DIR:-$tools/run}
wait_seconds=${CONNTRACK_WAIT_SECONDS:-60}

# Both configs read these, so they are exported.
export CONNTRACK_OTLP_GRPC_PORT=${CONNTRACK_OTLP_GRPC_PORT:-4317}
export CONNTRACK_OTLP_HTTP_PORT=${CONNTRACK_OTLP_HTTP_PORT:-4318}
export CONNTRACK_PROM_PORT=${CONNTRACK_PROM_PORT:-8889}
export CONNTRACK_HEALTH_PORT=${CONNTRACK_HEALTH_PORT:-13133}
export CONNTRACK_JAEGER_OTLP_PORT=${CONNTRACK_JAEGER_OTLP_PORT:-14317}
export CONNTRACK_JAEGER_QUERY_PORT=${CONNTRACK_JAEGER_QUERY_PORT:-16686}
# This script is for loopback only. The configs would take other hosts.
export CONNTRACK_LISTEN_HOST=127.0.0.1
export CONNTRACK_JAEGER_HOST=127.0.0.1

collector_ports="CONNTRACK_OTLP_GRPC_PORT CONNTRACK_OTLP_HTTP_PORT CONNTRACK_PROM_PORT CONNTRACK_HEALTH_PORT"
jaeger_ports="CONNTRACK_JAEGER_OTLP_PORT CONNTRACK_JAEGER_QUERY_PORT"

# The module's v1.76.0 is the release that is also called v2.13.0 (see
# jaeger/go.mod); cmd/jaeger in it is Jaeger v2.
jaeger_package=github.com/jaegertracing/jaeger/cmd/jaeger
jaeger_version=v2.13.0

say() { printf '%s\n' "$*" >&2; }

die() {
  say "local.sh: $*"
  exit 1
}

# ---------------------------------------------------------------- building

sha256() {
  if command -v sha256sum >/dev/null; then
    sha256sum
  else
    shasum -a 256
  fi
}

# A hash of all that a build depends on: the files in DIR, the build flags,
# and the platform (a cache may be carried to another machine).
inputs_hash() { # DIR FLAGS
  {
    uname -sm
    printf '%s\n' "$2"
    for file in "$1"/*; do
      printf '%s\n' "${file##*/}"
      cat "$file"
    done
  } | sha256 | cut -d' ' -f1
}

need_go() {
  command -v go >/dev/null || die "cannot find 'go', which is needed to build the Collector and Jaeger.
Install Go 1.25 or newer from https://go.dev/doc/install,
or use compose.yaml, which needs Docker instead."
  local version minor
  # GOTOOLCHAIN=local: the version installed, not one it would switch to.
  version=$(cd / && GOTOOLCHAIN=local go env GOVERSION)
  minor=${version#go1.}
  minor=${minor%%[!0-9]*}
  # From 1.21 on, Go fetches the version that go.mod asks for by itself.
  if [[ $version == go1.* && -n $minor && $minor -lt 21 ]]; then
    die "found $version, which is too old: install Go 1.25 or newer from https://go.dev/doc/install"
  fi
}

build_one() { # NAME DIR PACKAGE LDFLAGS
  local name=$1 dir=$2 package=$3 ldflags=$4
  local binary=$tools/bin/$name stamp=$tools/bin/$name.stamp hash
  hash=$(inputs_hash "$dir" "$package $ldflags")
  if [[ -x $binary && -f $stamp && $(<"$stamp") == "$hash" ]]; then
    return
  fi
  need_go
  mkdir -p "$tools/bin"
  say "building $name (some minutes the first time) ..."
  local started=$SECONDS
  # CGO off: no C compiler needed. GOWORK off and -mod=readonly: exactly the
  # versions in this go.mod, whatever surrounds this directory. Built next to
  # its place and then renamed, so a half-written program is never run.
  (
    cd "$dir"
    CGO_ENABLED=0 GOWORK=off nice -n 10 go build -mod=readonly -trimpath \
      -ldflags "$ldflags" -o "$binary.new.$$" "$package"
  ) || {
    rm -f "$binary.new.$$"
    die "building $name failed"
  }
  mv -f "$binary.new.$$" "$binary"
  printf '%s\n' "$hash" >"$stamp"
  say "built $name in $((SECONDS - started)) s: $binary"
}

build() {
  build_one collector "$here/collector" . "-s -w"
  build_one jaeger "$here/jaeger" "$jaeger_package" \
    "-s -w -X github.com/jaegertracing/jaeger/internal/version.latestVersion=$jaeger_version"
}

# ---------------------------------------------------------------- probing

# Bash's own TCP, so that curl is not needed.
port_open() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

http_ok() { # PORT PATH
  local status
  status=$(
    {
      exec 3<>"/dev/tcp/127.0.0.1/$1"
      printf 'GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n' "$2" >&3
      IFS= read -r -t 5 line <&3
      printf '%s' "$line"
    } 2>/dev/null
  ) || return 1
  [[ $status == "HTTP/1.1 200 "* ]]
}

collector_ready() {
  http_ok "$CONNTRACK_HEALTH_PORT" / && port_open "$CONNTRACK_OTLP_GRPC_PORT" &&
    port_open "$CONNTRACK_OTLP_HTTP_PORT" && port_open "$CONNTRACK_PROM_PORT"
}

jaeger_ready() {
  http_ok "$CONNTRACK_JAEGER_QUERY_PORT" /api/services && port_open "$CONNTRACK_JAEGER_OTLP_PORT"
}

# The pid of NAME if it runs. A pid file can outlive its process and the number
# can be given to another, so the command line has to be ours too.
running_pid() { # NAME
  local pid command
  pid=$(cat "$run/$1.pid" 2>/dev/null) || return 1
  [[ $pid =~ ^[0-9]+$ ]] && kill -0 "$pid" 2>/dev/null || return 1
  if [[ -r /proc/$pid/cmdline ]]; then
    # It may be gone by now, hence the braces: no message then.
    command=$({ tr '\0' ' ' <"/proc/$pid/cmdline"; } 2>/dev/null) || return 1
  else
    command=$(ps -p "$pid" -o command=) || return 1
  fi
  [[ $command == *"--config=$here/$1.yaml"* ]] || return 1
  printf '%s\n' "$pid"
}

# ---------------------------------------------------------------- ports

check_ports() {
  local name other
  for name in $collector_ports $jaeger_ports; do
    [[ ${!name} =~ ^[1-9][0-9]{0,4}$ && ${!name} -le 65535 ]] ||
      die "$name must be a port from 1 to 65535, not '${!name}'"
    for other in $collector_ports $jaeger_ports; do
      [[ $name == "$other" || ${!name} != "${!other}" ]] ||
        die "$name and $other are both ${!name}"
    done
  done
}

print_ports() {
  local name
  for name in $collector_ports $jaeger_ports; do
    printf '%s=%s\n' "$name" "${!name}"
  done
}

# What is running may have been started with other ports than are set now.
load_ports() {
  local name value
  if running_pid collector >/dev/null || running_pid jaeger >/dev/null; then
    [[ -f $run/ports ]] || return 0
    while IFS='=' read -r name value; do
      case " $collector_ports $jaeger_ports " in
        *" $name "*) export "$name=$value" ;;
      esac
    done <"$run/ports"
  fi
}

# ---------------------------------------------------------------- commands

start_one() { # NAME PORT_NAMES
  local name=$1 pid port
  if pid=$(running_pid "$name"); then
    say "$name is already running (pid $pid)"
  else
    for port in $2; do
      ! port_open "${!port}" ||
        die "port ${!port} is in use by another program: stop it, or set $port to a free port"
    done
    # Its own process group (set -m) and nohup, so that it outlives this script
    # and its terminal. Descriptor 9 is the lock, which it must not hold.
    set -m
    nohup "$tools/bin/$name" "--config=$here/$name.yaml" \
      >"$run/$name.log" 2>&1 </dev/null 9>&- &
    pid=$!
    set +m
    printf '%s\n' "$pid" >"$run/$name.pid"
    started="$name $started"
  fi

  local deadline=$((SECONDS + wait_seconds))
  until "${name}_ready"; do
    if ! kill -0 "$pid" 2>/dev/null; then
      fail_start "$name stopped while starting"
    elif ((SECONDS >= deadline)); then
      fail_start "$name was not ready after $wait_seconds s"
    fi
    sleep 0.2
  done
}

fail_start() { # MESSAGE; uses $name of start_one
  say "local.sh: $1. The end of $run/$name.log:"
  tail -n 30 "$run/$name.log" >&2 || true
  exit 1
}

# On any failure of `up`, stop what it started, so as to leave nothing half up.
undo_start() {
  local code=$? name
  if ((code != 0)); then
    for name in $started; do
      stop_one "$name"
    done
  fi
  exit "$code"
}

up() {
  check_ports
  mkdir -p "$run"
  # Two `up` at once would race for the ports.
  if command -v flock >/dev/null; then
    exec 9>"$run/lock"
    flock 9
  fi

  if running_pid collector >/dev/null || running_pid jaeger >/dev/null; then
    if [[ -f $run/ports && $(print_ports) != "$(<"$run/ports")" ]]; then
      die "already running with other ports (see 'local.sh status'): run 'local.sh down' first,
or set CONNTRACK_RUN_DIR to another directory for a second pair"
    fi
  fi

  build
  started=""
  trap undo_start EXIT
  print_ports >"$run/ports"
  start_one jaeger "$jaeger_ports"
  start_one collector "$collector_ports"
  trap - EXIT
  addresses
}

stop_one() { # NAME
  local name=$1 pid i
  if pid=$(running_pid "$name"); then
    kill "$pid" 2>/dev/null || true
    for ((i = 0; i < 150; i++)); do
      running_pid "$name" >/dev/null || break
      sleep 0.1
    done
    if running_pid "$name" >/dev/null; then
      say "$name (pid $pid) does not stop: killing it"
      kill -KILL "$pid" 2>/dev/null || true
      for ((i = 0; i < 50; i++)); do
        running_pid "$name" >/dev/null || break
        sleep 0.1
      done
    fi
    say "stopped $name (pid $pid)"
  fi
  rm -f "$run/$name.pid"
}

down() {
  # The Collector first, so that it can still hand its last batch to Jaeger.
  stop_one collector
  stop_one jaeger
  rm -f "$run/ports"
}

addresses() {
  cat <<EOF
OTLP over gRPC   http://127.0.0.1:$CONNTRACK_OTLP_GRPC_PORT
OTLP over HTTP   http://127.0.0.1:$CONNTRACK_OTLP_HTTP_PORT
metrics          http://127.0.0.1:$CONNTRACK_PROM_PORT/metrics
health           http://127.0.0.1:$CONNTRACK_HEALTH_PORT/
Jaeger query     http://127.0.0.1:$CONNTRACK_JAEGER_QUERY_PORT/api/services
logs             $run
EOF
}

status() {
  local name pid code=0
  load_ports
  for name in collector jaeger; do
    if ! pid=$(running_pid "$name"); then
      echo "$name: not running"
      code=3
    elif ! "${name}_ready"; then
      echo "$name: running (pid $pid) but not ready"
      code=3
    else
      echo "$name: up (pid $pid)"
    fi
  done
  ((code != 0)) || addresses
  return "$code"
}

print_env() {
  load_ports
  cat <<EOF
OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:$CONNTRACK_OTLP_GRPC_PORT
OTEL_EXPORTER_OTLP_PROTOCOL=grpc
OTLP_HTTP_ENDPOINT=http://127.0.0.1:$CONNTRACK_OTLP_HTTP_PORT
PROMETHEUS_METRICS=http://127.0.0.1:$CONNTRACK_PROM_PORT/metrics
COLLECTOR_HEALTH=http://127.0.0.1:$CONNTRACK_HEALTH_PORT/
JAEGER_QUERY=http://127.0.0.1:$CONNTRACK_JAEGER_QUERY_PORT
EOF
}

case ${1:-} in
  up) up ;;
  down) down ;;
  status) status ;;
  env) print_env ;;
  build) build ;;
  help | -h | --help) usage ;;
  *)
    usage >&2
    exit 2
    ;;
esac
