"""Drives consul_server.py with py-consul, an independent client, as a service and its callers would.

    consul_check.py PORT
"""

import sys
import threading
import time

import consul

client = consul.Consul(host="127.0.0.1", port=int(sys.argv[1]))
assert client.status.leader() == "127.0.0.1:8300"
index, nodes = client.health.service("web")
assert nodes == [], nodes

registered = client.agent.service.register(
    "web", service_id="web-1", address="127.0.0.1", port=8080, tags=["v1"],
    meta={"zone": "a"}, check=consul.Check.ttl("15s"),
)
assert registered
later, nodes = client.health.service("web")
assert int(later) > int(index)
service = nodes[0]["Service"]
assert (service["ID"], service["Port"], service["Meta"]) == ("web-1", 8080, {"zone": "a"})
statuses = {check["CheckID"]: check["Status"] for check in nodes[0]["Checks"]}
assert statuses == {"serfHealth": "passing", "service:web-1": "critical"}, statuses

# A blocking query returns with the change and not before.
found = []
waiting = threading.Thread(
    target=lambda: found.append(client.health.service("web", index=later, wait="60s"))
)
waiting.start()
time.sleep(0.2)
assert not found
client.agent.check.ttl_pass("service:web-1")
waiting.join(20)
index, nodes = found[0]
assert int(index) > int(later)
assert [c["Status"] for c in nodes[0]["Checks"]] == ["passing", "passing"]

# And without a change when its time is over.
same, _ = client.health.service("web", index=index, wait="100ms")
assert same == index

client.agent.service.maintenance("web-1", "true", "cleaning")
_, nodes = client.health.service("web")
assert "_service_maintenance:web-1" in [c["CheckID"] for c in nodes[0]["Checks"]]
client.agent.service.maintenance("web-1", "false")
client.agent.service.deregister("web-1")
assert client.health.service("web")[1] == []
print("all as expected")
