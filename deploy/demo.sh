#!/usr/bin/env bash
# Starts or stops the demo stack in the background: `demo.sh start|stop BIN STATE [MODEL]`. State, log and the
# MODEL's folder lie in STATE.
set -euo pipefail
action=$1 bin=$2 state=$3
port=${PORT:-8180}
url=http://127.0.0.1:$port
pid_file=$state/serve.pid
log=$state/serve.log
model=$state/${4:-wint2}

is_running() { [[ -s $pid_file ]] && kill -0 "$(<"$pid_file")" 2>/dev/null; }

launch() {
    setsid "$bin/wint2" serve --model "$model" --port "$port" </dev/null >"$log" 2>&1 &
    local server=$!
    echo "$server" >"$pid_file"
    tail -n +1 -f --pid="$server" "$log" &
    local follower=$!
    "$bin/wint2" probe "$url/health" --wait 900 --while-pid "$server" 2>/dev/null || {
        wait "$follower"
        rm -f "$pid_file"
        echo "error: the stack did not start; its log is $log" >&2
        exit 1
    }
    sleep 0.5 # the last lines of the start
    kill "$follower"
}

start() {
    if is_running; then echo "already running (pid $(<"$pid_file"))"; else launch; fi
    local prompt="In one sentence: what is the capital of France?"
    printf '\n> %s\n' "$prompt"
    "$bin/wint2" chat --url "$url" --temperature 0 --max-tokens 64 "$prompt"
    cat <<END

The server goes on at $url (make stop ends it). Ask it yourself:

  curl -N $url/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Tell me a short story."}], "stream": true}'

  $bin/wint2 chat --url $url
END
}

stop() {
    if ! is_running; then
        echo "nothing to stop"
        rm -f "$pid_file"
        return
    fi
    local pid=$(<"$pid_file")
    kill -TERM "$pid"
    tail --pid="$pid" -f /dev/null
    rm -f "$pid_file"
    echo "stopped"
}

"$action"
