# make test proves everything against real servers; see the targets below.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

bin := .cache/bin
out := $(CURDIR)/$(bin)
started := $(shell date +%s)

# phase prints a line with the seconds since make began.
phase = printf '[%4d s] %s\n' $$(( $$(date +%s) - $(started) )) '$(1)'

.PHONY: test servers tools fmt vet staticcheck govulncheck compile unit lint bench bulk chaos consistency soak console lists slow-clients fuzz compare-images peers api-check deploy-check docker-test clean

## test: install what is missing, then check and test everything
# The recursive call lets the installation, the builds and the checks run side
# by side; the tests come last and have the machine to themselves.
test:
	@$(call phase,install servers; build tools; check)
	@$(MAKE) --no-print-directory -j2 started=$(started) servers tools lint compile
	@$(MAKE) --no-print-directory started=$(started) unit
	@$(call phase,all passed)

# SQLite is C made into Go, with its memory in one slice: watched by the race
# detector it takes several times as long, and has nothing of ours to be found.
race := -race -gcflags='github.com/ncruces/go-sqlite3-wasm/...=-race=false'

compile:
	@go test $(race) -run '^$$' ./... >/dev/null
	@$(call phase,tests are compiled)

unit:
	@$(call phase,go test -race)
	@REQUIRE_SERVERS=1 go test $(race) -count=1 -parallel 4 -timeout 17m ./...

## servers: PostgreSQL, Redis, RabbitMQ and a browser, from the distribution's packages
servers:
	@scripts/install-test-servers.sh
	@scripts/install-test-browser.sh
	@scripts/fetch-test-photos.sh
	@$(call phase,servers are installed)

## tools: the S3 server of the tests, and the linters, in .cache/bin
tools: $(bin)/versitygw $(bin)/staticcheck
	@:

$(bin)/versitygw: tools/s3d/go.mod tools/s3d/go.sum
	@mkdir -p $(bin)
	@go build -C tools/s3d -o $(out)/ tool
	@touch $@
	@$(call phase,versitygw is built)

$(bin)/staticcheck: tools/lint/go.mod tools/lint/go.sum
	@mkdir -p $(bin)
	@go build -C tools/lint -o $(out)/ tool
	@touch $@
	@$(call phase,linters are built)

## lint: gofmt, go vet, staticcheck, govulncheck
lint: fmt vet staticcheck govulncheck

fmt:
	@files=$$(gofmt -l .); [ -z "$$files" ] || { echo "gofmt -w is needed for:" $$files; exit 1; }

vet:
	@go vet ./...
	@$(call phase,go vet)

staticcheck: $(bin)/staticcheck vet
	@$(bin)/staticcheck ./...
	@$(call phase,staticcheck)

govulncheck: $(bin)/staticcheck vet
	@scripts/govulncheck.sh $(bin)/govulncheck
	@$(call phase,govulncheck)

## bench: the benchmarks (BENCH=Get: some of them), six rounds in turns, summed up
bench: BENCH = .
bench: servers tools
	@go test -c -o .cache/bench.test .
	@for round in 1 2 3 4 5 6; do REQUIRE_SERVERS=1 .cache/bench.test -test.run '^$$' -test.bench '$(BENCH)' -test.benchmem; done | tee .cache/bench.txt
	@$(bin)/benchstat .cache/bench.txt

## api-check: openapi.yaml by outside tools, against the running program (npm; Java for one of them)
api-check:
	@scripts/install-apicheck.sh
	@scripts/api-check.sh

## deploy-check: what can be said of the deployment files without deploying
deploy-check:
	@scripts/install-apicheck.sh
	@scripts/deploy-check.sh

## fuzz: every fuzz target, FUZZTIME each (10 minutes)
# One worker, at low priority: it may run beside other work.
FUZZTIME ?= 10m
fuzz:
	@for target in $$(go test -list '^Fuzz' . | grep '^Fuzz'); do \
		echo "$$target for $(FUZZTIME)"; \
		nice -n 15 go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 5s -parallel 1 .; \
	done

## slow-clients: reads beside 500 slow clients and 500 half-open connections, compared with reads without; a minute
slow-clients: servers tools
	@SLOW_CLIENTS_READS=20000 go test -count=1 -run '^TestSlowClientsSlowDownNobodyElse$$' -v .

## compare-images: CPU, bytes, memory and likeness against sharp (npm), on real photographs
compare-images:
	@scripts/compare-images.sh

## peers: requests a second, CPU, latency and memory against PocketBase, by one client, in turns; 5 to 15 minutes
peers: servers tools $(bin)/pocketbase
	@PEERS=$(CURDIR)/$(bin) REQUIRE_SERVERS=1 go test -count=1 -run '^TestCompareWithPeers$$' -v -timeout 60m .

$(bin)/pocketbase: tools/peers/go.mod tools/peers/go.sum tools/peers/main.go
	@mkdir -p $(bin)
	@CGO_ENABLED=0 go build -C tools/peers -o $(out)/pocketbase .
	@$(call phase,PocketBase is built)

## chaos: everything is killed, frozen and cut off while products come in, and the program at every step; an audit of what became of it all; 10 minutes
# CHAOS_IMAGES, CHAOS_FAULTS and CHAOS_DURATION make it longer or shorter, CHAOS_SEED repeats a choice of faults.
chaos: servers tools
	@REQUIRE_SERVERS=1 CHAOS_IMAGES=$${CHAOS_IMAGES:-5000} CHAOS_FAULTS=$${CHAOS_FAULTS:-100} \
		CRASH_POINTS=all go test -count=1 -run '^(TestChaos|TestCrashPoints)$$' -v -timeout 25h .

## consistency: a million reads while Redis is hurt, checked against what clients may see; some minutes
consistency: servers tools
	@REQUIRE_SERVERS=1 CONSISTENCY_READS=1000000 go test -count=1 -run '^TestReadsAreConsistent$$' -v -timeout 60m .

## soak: all that clients do, in rounds, for SOAK_DURATION (20m); nothing may grow, in the processes and on the servers
soak: servers tools
	@REQUIRE_SERVERS=1 SOAK_DURATION=$${SOAK_DURATION:-20m} go test -count=1 -run '^TestSoak$$' -v -timeout 25h .

## console: the walk through the console in every look; its pictures are in .cache/screenshots
console: servers tools
	@REQUIRE_SERVERS=1 CONSOLE_LOOKS=all go test -count=1 -run '^TestConsoleInABrowser$$' -v .

## lists: the plans of every list of a million products, read with EXPLAIN ANALYZE; a minute
lists: servers tools
	@REQUIRE_SERVERS=1 LISTS_PRODUCTS=1000000 go test -count=1 -run '^TestListsReadNoMoreThanTheyNeed$$' -v -timeout 30m .

## bulk: an import of 100,000 rows, with its rate and memory; a minute. BULK_ROWS makes it longer or shorter
bulk: servers tools
	@REQUIRE_SERVERS=1 BULK_ROWS=$${BULK_ROWS:-100000} go test -count=1 -run '^TestBulkImport$$' -v .

## docker-test: make test in a container, for machines without the servers
docker-test:
	docker run --rm --init -v "$(CURDIR)":/src -w /src \
		-v pms-go-mod:/go/pkg/mod -v pms-go-build:/root/.cache/go-build -v pms-tools:/src/.cache -e GOFLAGS=-buildvcs=false \
		golang:1.26-bookworm make test

## clean: remove what make built; the Go caches stay
clean:
	rm -rf .cache
